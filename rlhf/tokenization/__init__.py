"""Messages to token ids and back; the HHH prompt."""
