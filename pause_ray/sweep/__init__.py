"""Many trials: which there are, in which order they run, and where.

A trial passes through these modules: ``spec`` makes it from an arm and a point, ``search`` prepares it, ``runner`` makes its training
sequences and puts it into the ``queue``, and ``trainable`` (with a scheduler ``early_stopping``) gives it a process that runs it. Its
reports go through ``reporter`` to ``progress`` and ``status``.
"""
