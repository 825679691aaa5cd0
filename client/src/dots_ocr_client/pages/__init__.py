"""Files into pictures of pages, and what PDFs say of themselves."""
