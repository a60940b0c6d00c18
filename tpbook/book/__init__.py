"""What the book needs and the library does not: pictures, the explorer, results and experiments."""
