"""Feedback without weight transport: FA, DFA, DRTP and sign-symmetry."""
