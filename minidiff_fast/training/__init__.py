"""Training on Accelerate: ``config`` (options), ``loop`` (the steps), ``checkpoint``, ``report``, and one
module a task.

Importing this package imports nothing.
"""
