"""A page on which people rank responses, and the file that keeps what they say."""
