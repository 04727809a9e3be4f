"""The linear-attention operator, its window companion and the forms. Depends on torch only.

`operator.linear_attention` is the contract every backend and engine is held to; `reference` is the truth it is held
to; `forms` turn a teacher's queries, keys and values into the operator's operands.
"""
