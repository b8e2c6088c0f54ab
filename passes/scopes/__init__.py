"""The three scopes of capture: a whole program, a frame that Dynamo hands over, one module alone.

In: a model and example inputs. Out: pre-dispatch ATen with fake values, the same for every pass.
"""
