"""What every exported model needs: its folder, the check in a fresh process, its card, the push."""
