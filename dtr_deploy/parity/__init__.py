"""The proof that every exported model computes what was trained: prompts, distances, the ladder and its gate."""
