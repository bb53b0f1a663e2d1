"""`compile --report`: one HTML page that needs nothing beside it, and timelines for ui.perfetto.dev.

    data.py    everything the page says, as plain data, from the artifact
    plots.py   rooflines, timelines and the memory plan as SVG
    page.py    the page and the files beside it
"""
