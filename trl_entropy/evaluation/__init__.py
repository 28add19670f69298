"""A model against problems: what generates, which problems, what grades, and what the samples say."""
