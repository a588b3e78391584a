"""What happens to an operand before an operation, and who carries it out.

A stage is a file here, or a class of the mode that chooses it; `run` is what applies
the stages that a mode chooses for the params and the operations of a traced call.
"""
