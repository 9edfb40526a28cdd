"""Real processes: the commands flower-server and flower-client over Flower's own daemons.

Alone with fedmoe.exchange in knowing Flower. keys.py makes certificates and keys; child.py is what
runs within a daemon; processes.py starts and ends it; control.py speaks with a SuperLink; serve.py
and join.py are the two commands, and app.py says what can be typed.
"""
