"""How text is sampled. This module imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen and when to stop."""

    max_new_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher values sample, 1 from the model's own distribution."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Seed for sampling."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_new_tokens < 1:
            raise ValueError(
                f"`max_new_tokens` ({self.max_new_tokens}) must be at least 1; raise it."
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` ({self.temperature}) must be 0 (greedy) or a positive number."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` ({self.top_p}) must be in (0, 1]; 1 keeps every token.")
        if self.seed < 0:
            raise ValueError(f"`seed` ({self.seed}) must be at least 0.")
