"""What ranges of activations are found with: observers, and averagings over batches.

They know arrays and types, and neither rules nor models: rules name them.
"""
