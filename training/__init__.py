"""How `weights/tiny` was made: picture generator, tokenizer, model, recipe, export, evaluation."""
