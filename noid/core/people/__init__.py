"""Users: their tokens, what they may have, what they did, and how they go."""
