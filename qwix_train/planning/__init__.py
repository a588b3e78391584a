"""What users ask for, and what becomes of it: rules, plans, and leaves."""
