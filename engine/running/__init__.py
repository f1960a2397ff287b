"""Answers in the making: prefill, decode steps and how they are taken, sampling, batches, chats."""
