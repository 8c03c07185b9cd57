"""Many trials: which there are, in which order they run, and where.

The way of one trial: ``spec`` makes it of an arm and a point, ``rounds`` prepares it, ``execution`` makes its rows and puts it in
``line``, ``tuning`` (under a scheduler ``governed`` and ``governed_trial``) gives it a process that calls ``trial.run``; what it says
there goes over ``board`` to ``watch`` and ``progress``. ``run`` is the order of all this.
"""
