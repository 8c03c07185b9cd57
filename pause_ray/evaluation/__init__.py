"""Questions hidden in long contexts: asked, answered, graded, kept and compared."""
