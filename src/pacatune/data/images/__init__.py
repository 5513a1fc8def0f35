"""Images for classification: a table from anywhere, checked; and as the model sees them."""
