"""What speed and memory are, measured on the code that trains."""
