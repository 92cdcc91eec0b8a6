"""The sizes of the tiny models."""

VOCAB, WIDTH, WINDOW = 23, 16, 4
