"""PaCA in PEFT's comparison of methods on MetaMathQA; see README.md."""
