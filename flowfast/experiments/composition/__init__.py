"""Which time grid is good, and when composing helps: many small students at one budget, and what predicts them."""
