"""Text data for fine-tuning: read, check, tokenize, and mask what is not learned."""
