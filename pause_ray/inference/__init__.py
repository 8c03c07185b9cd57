"""Engines that answer prompts: Hugging Face models in this process, endpoints, scripted answers."""
