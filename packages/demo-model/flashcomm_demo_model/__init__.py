"""The weights and the tokenizer of flashcomm's demo model: this folder is a Hugging Face model directory."""
