"""What a prompted teacher says, taught to a student without the prompt (Askell 2021, section 2)."""
