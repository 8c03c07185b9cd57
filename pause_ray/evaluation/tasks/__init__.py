"""The kinds of questions that a suite can ask."""
