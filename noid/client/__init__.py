"""The client: finds an agent, talks to it, streams exec. Imports no server and nothing that makes starting slow."""
