"""Anybody's Flower apps, run fast: a `flwr.serverapp.Grid` that keeps no queue and asks nobody.

`run_apps` (apps.py) runs an unmodified ServerApp and ClientApp, in this process or on Ray's actors;
`python -m fedmoe.exchange.grid` runs an app that lies in a folder. Nothing of fedmoe is in either,
and nothing here imports torch.

As in Flower's simulation, apps get copies of messages, a client that raises is an error reply and
leaves its context as it was, and a message is valid for its time to live. Unlike there:
- nodes are 2 to N + 1, and all of them are there when the server begins;
- a node's context stays where the node lives, and is made when the node is first asked;
- `send_and_receive` gives replies sorted by node, so that sums over them have the same bits;
- what a server changes in a message after pushing it, no client sees;
- a ClientApp that returns no reply to its message gives an error, and is not waited for in vain;
- an actor that dies is replaced, and what it had not answered is done again, nothing twice;
- the reason of an error is `<class 'ValueError'>:<'boom'>`, as in Flower's deployment.
"""
