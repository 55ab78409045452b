"""Decision processes over allocations, in Gymnasium's terms.

An environment here receives its evaluator and can only represent allocations within the budget.
"""
