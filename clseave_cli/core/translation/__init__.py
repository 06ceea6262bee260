"""Translation engines and the memory that keeps what they said."""
