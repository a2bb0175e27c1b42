"""The pages of the documentation, and the scripts that make and measure them."""
