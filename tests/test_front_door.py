"""The table of what the program promises at its front door, and which tests hold it to that.

Rows 1 to 47 of the bad inputs are found by the names of their tests (``pytest -k row12``); flags,
complaints about programs of this kind and known attacks are listed here by hand. A line that names
a test which is no longer there, and a flag without a line, fail.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from engine.app.flags import build_parser

HERE = Path(__file__).parent
ROWS = ("test_bad_pictures", "test_bad_weights", "test_bad_options")

# Every flag, and the test that uses it from end to end: file and name, both without "test_".
FLAGS = {
    "--image": "cli.prompt_and_picture_may_come_from_stdin_and_files",
    "--video": "video.the_command_line_answers_as_the_library",
    "--frames": "video.the_command_line_answers_as_the_library",
    "--fps": "video.bad_flags",
    "--start": "video.the_command_line_answers_as_the_library",
    "--end": "video.bad_flags",
    "--allow-url": "bad_pictures.row22_a_redirect_inwards_is_not_followed",
    "--max-pixels": "cli.refusals",
    "--prompt": "bad_options.bad_option",
    "--system": "cli.a_system_text_reaches_the_model",
    "--chat": "repl.piped_lines_end_to_end",
    "--batch": "batch.a_process_killed_again_and_again_loses_nothing",
    "--output": "batch.a_process_killed_again_and_again_loses_nothing",
    "--rows": "batch.a_process_killed_again_and_again_loses_nothing",
    "--ray": "spread.what_a_cluster_needs",
    "--workers": "spread.workers_need_a_cluster",
    "--raw": "cli.a_system_text_reaches_the_model",
    "--model": "hub_server.the_command_line_downloads_by_name",
    "--revision": "cli.flags_of_the_model_reach_the_engine",
    "--offline": "cli.flags_of_the_model_reach_the_engine",
    "--weights": "few_bits.stats_name_formats_and_bytes",
    "--dtype": "cli.flags_of_the_model_reach_the_engine",
    "--device": "bad_options.no_cuda_says_why",
    "--threads": "cli.flags_of_the_model_reach_the_engine",
    "--style": "cli.flags_of_the_model_reach_the_engine",
    "--convert": "hub_server.a_conversion_downloads_its_source_as_models_are",
    "--max-image-tokens": "qwen_patches.pictures_may_be_limited_to_so_many_tokens",
    "--as-published": "published.the_flag_reaches_the_engine",
    "--vision-tower": "towers.a_tower_may_be_named_when_loading",
    "--max-new-tokens": "cli.flags_of_an_answer_reach_the_engine",
    "--temperature": "cli.flags_of_an_answer_reach_the_engine",
    "--top-k": "cli.flags_of_an_answer_reach_the_engine",
    "--top-p": "cli.flags_of_an_answer_reach_the_engine",
    "--seed": "cli.flags_of_an_answer_reach_the_engine",
    "--stop": "cli.flags_of_an_answer_reach_the_engine",
    "--repetition-penalty": "cli.flags_of_an_answer_reach_the_engine",
    "--logprobs": "bad_pictures.odd_picture_is_seen_as_it_should_be",
    "--no-stream": "cli.stdout_is_the_answer_alone",
    "--cache": "cli.compare_shows_both_answers",
    "--sync-selection": "streams.flags_reach_the_engine",
    "--graphs": "streams.flags_reach_the_engine",
    "--compare": "cli.compare_shows_both_answers",
    "--stats": "cli.stdout_is_the_answer_alone",
    "--json": "cli.json_is_one_object",
    "--attention": "page.the_command_line_writes_the_page",
    "--draw-boxes": "qwen_vl.draw_boxes_paints_the_last_picture",
    "--check": "doctor.json_is_one_object_with_every_check",
    "--quiet": "cli.stdout_is_the_answer_alone",
    "--verbose": "cli.a_system_text_reaches_the_model",
    "--debug": "cli.debug_shows_the_traceback",
    "--version": "cli.version_is_a_line",
}

# What users of such programs complain about, in the order of the survey.
COMPLAINTS = {
    1: "anyres.counted_tokens_are_the_rows_of_the_features_on_10_000_sizes",
    2: "preprocess.many_odd_sizes_equal_transformers",
    3: "preprocess.pad_equals_transformers_and_the_original_code",
    4: "bad_pictures.odd_picture_is_seen_as_it_should_be",
    5: "image.transparency_is_shown_on_white",
    6: "image.unknown_ranges_and_spaces_are_refused",
    7: "image.truncated_jpeg_is_refused_even_if_pillow_is_told_to_fill",
    8: "bad_pictures.row08_every_bad_picture_costs_little_time_and_memory",
    9: "generation.context_is_checked_before_prefill",
    10: "bad_weights.bad_weight_file",
    11: "load_weights.differences_are_three_lists_with_five_names_and_the_count",
    12: "generation.weights_that_are_not_finite_are_refused",
    13: "batch.a_batch_answers_as_single_requests_do",
    14: "prompt.canonical_prompt_has_the_published_ids",
    15: "engine_api.pictures_fill_their_places_in_order",
    16: "batch.a_picture_is_encoded_once",
    17: "tokenizer.no_text_at_all_reaches_a_special_id",
    18: "tokenizer.stream_joins_to_the_text",
    19: "cache_invariants.evicting_much_leaves_positions_equal_to_tokens_seen",
    20: "cli.compare_shows_both_answers",
    21: "load_weights.peak_memory_is_the_model_and_one_tensor",
    22: "parity.every_layout_is_the_same_model",
    23: "qwen_vl.replays_the_original_code",
    24: "page.attention_on_the_page_is_the_attention_that_was_seen",
    25: "bench_common",
    26: "generation.the_same_request_gives_the_same_answer",
    27: "image.every_format_opens_whatever_its_name",
}

# Known attacks on such programs and their libraries.
ATTACKS = {
    "decoding before the size is checked": "image.bombs_are_refused_from_the_header",
    "pictures of one pixel": "preprocess.extreme_shapes_are_small_work",
    "addresses in error messages": "bad_pictures.pillow_may_raise_what_it_likes",
    "weak keys of remembered pictures": "batch.a_picture_is_encoded_once",
    "requests to inner networks": "remote.a_name_that_resolves_inwards_is_refused",
    "redirects to inner networks": "bad_pictures.row22_a_redirect_inwards_is_not_followed",
    "names that resolve slowly": "bad_pictures.row22_a_resolver_that_sleeps_meets_the_deadline",
    "code in checkpoints": "convert.a_pickle_that_runs_code_is_refused_and_runs_nothing",
    "products that overflow": "bad_weights.bad_weight_file",
    "sizes of a configuration": "fuzz.only_our_errors_come_out",
    "slots and counts out of range": "attention.a_slot_out_of_range_is_refused",
    "templates in checkpoints": "prompt.rendered_text",
    "escapes for the terminal": "cli.a_terminal_gets_no_control_characters",
    "rare decoders": "bad_pictures.pillow_is_new_enough_and_reaches_eight_decoders_only",
    "decoders that print": "bad_pictures.pillow_says_nothing_by_itself",
    "special tokens in a user's text": "bad_options.row38_spellings_of_special_tokens_are_text",
}

# What is promised beside: names of models, chat, errors, long use.
PROMISES = {
    "size first": "hub_server.a_model_is_downloaded_said_first_and_then_found_without_network",
    "broken connections resumed": "hub_server.a_connection_that_breaks_is_taken_up_where_it_was",
    "a stalled connection is given up": "hub_server.a_connection_that_stalls_is_given_up",
    "a wrong hash is refused": "hub_server.a_file_with_the_wrong_hash_is_refused_and_not_kept",
    "gated, missing, full, broken: a line": "hub_server.the_command_line_says_it_in_one_line",
    "--check compares hashes": "hub_server.check_names_the_file_whose_content_is_not_the_hubs",
    "editing, pastes, history": "repl.a_terminal_edits_pastes_and_remembers",
    "Ctrl-C stops an answer": "repl.ctrl_c_stops_the_answer_and_the_conversation_goes_on",
    "a second one leaves": "repl.a_second_ctrl_c_leaves",
    "nothing of the user's is overwritten": "files.a_picture_that_is_read_is_never_written_over",
    "folders are left alone": "convert.a_folder_that_holds_something_else_is_left_alone",
    "answers of another job": "batch.answers_to_other_requests_models_and_caches_are_refused",
    "the user's pages and pictures are not replaced": (
        "files.a_file_of_the_users_is_never_written_over"
    ),
    "a changed file stops a conversion": (
        "convert.a_changed_file_is_found_before_anything_is_written"
    ),
    "finished shards are verified": "convert.leftovers_of_a_crash_are_written_again",
    "what is read has a limit": "bad_options.what_is_read_whole_has_a_limit",
    "a dropped picture is shown": "repl.a_picture_alone_on_a_line_is_shown",
    "Ctrl-C is silent from the start": "cli.ctrl_c_is_silent_from_the_first_line_on",
    "no flag is ignored": "words.a_mode_takes_a_flag_or_refuses_it_by_name",
    "one request ends no job": "batch.whatever_goes_wrong_in_a_row_is_that_rows_failure",
    "help starts with examples": "cli.help_starts_with_examples",
    "an error prints no JSON": "cli.an_error_is_no_json",
    "wrong flags fail fast": "bad_options.wrong_flags_cost_little_time",
    "killed and started again": "batch.a_process_killed_again_and_again_loses_nothing",
    "memory stays flat": "soak.long_soak",
    "interrupts do no harm": "soak.many_interrupts_leave_the_engine_usable",
}


def names_in(module: ModuleType) -> Iterator[str]:
    """Names of a module's tests, and the ids of their rows."""
    for name, function in vars(module).items():
        if name.startswith("test_"):
            yield name
            for mark in getattr(function, "pytestmark", ()):
                if mark.name == "parametrize":
                    for value in mark.args[1]:  # an id, or a row that begins with one
                        yield str(value[0] if isinstance(value, tuple) and value else value)


def test_every_bad_input_is_tried() -> None:
    names = [name for file in ROWS for name in names_in(importlib.import_module(f"tests.{file}"))]
    tried = {row: sum(f"row{row:02}" in name for name in names) for row in range(1, 48)}
    assert all(tried.values()), tried
    assert sum(tried.values()) > 130


def test_every_flag_is_used() -> None:
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {flag for flag in flags if flag.startswith("--")} - {"--help"} == FLAGS.keys()


@pytest.mark.parametrize("table", [FLAGS, COMPLAINTS, ATTACKS, PROMISES])
def test_what_the_tables_name_is_there(table: dict[object, str]) -> None:
    for subject, place in table.items():
        file, _, name = place.partition(".")
        text = (HERE / f"test_{file}.py").read_text()
        assert not name or f"\ndef test_{name}(" in text, place
        if table is FLAGS:
            assert f'"{subject}"' in text, f"{file} does not use {subject}"


def test_complaints_are_numbered_without_gaps() -> None:
    assert list(COMPLAINTS) == list(range(1, 28))
