"""The base model, its adapters and heads, and what computes with them."""
