"""Self-contained HTML reports: the page and the axes that every plot shares. What a page says, others decide."""
