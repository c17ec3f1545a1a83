"""Structural alignment on raw tokens: plain reference forms, exact cheap forms, and the choice between them."""
