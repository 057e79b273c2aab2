"""Hold cleanfs against what it promises about sizes and numbers; one promise to a module."""
