"""What is above everything else: studies and reproductions of the paper."""
