"""What is above everything else: the paper as data, studies, reproductions and demonstrations."""
