"""The reverse proxy: ``http://PORT-NAME.DOMAIN`` leads to a port inside a sandbox."""
