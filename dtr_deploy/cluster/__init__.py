"""Stages 1 and 2 on a Ray cluster: groups of twins, parts of scores and measurements as tasks of its workers.

Everything else of a build stays in the process that was started. Nothing here is imported unless a recipe names a
cluster; `ray` is the extra `cluster`.
"""
