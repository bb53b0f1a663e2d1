"""The autotuner: which choices (ir/tuning.py) make a program fastest on a target.

    space.py      what may be chosen for a program and a target, and why the rest may not
    measured.py   a processor's candidates, timed beside the default on this machine
    modelled.py   a GPU's candidates, compiled for it and modelled (compiler/gpu/step_model.py)
    calibrate.py  how far the model is off where it can be measured
    search.py     candidates one after the other until the budget is spent; kept in a journal, resumed from it
    database.py   what was found, by program, target and machine; explain.py says why
    lookup.py     what `compile` takes from the database
"""
