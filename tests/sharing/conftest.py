from tests.servers.hub_server import hub

__all__ = ["hub"]
