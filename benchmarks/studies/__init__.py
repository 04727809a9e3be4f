"""Studies: each one question about the method, answered with one command and kept in docs/studies/."""
