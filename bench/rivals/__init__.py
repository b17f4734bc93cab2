"""Plain torch that takes part in the comparisons: formulas as published, and lean versions of them."""
