"""Pure text and tokens: segments, pauses, tokens, prompts."""
