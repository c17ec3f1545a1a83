"""Losses between the token-to-token cosine similarities (Gram matrices) of student and teacher."""
