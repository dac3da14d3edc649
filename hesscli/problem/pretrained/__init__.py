"""Models as transformers and PEFT save them: a folder, data, and no spec."""
