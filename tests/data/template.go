// Renders a Modelfile's TEMPLATE with Go's own text/template, as Ollama does. Standard input: {"template": "...",
// "asked": [{"System": "...", "Prompt": "..."}]}; standard output: the renderings as a JSON list.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

func main() {
	var order struct {
		Template string              `json:"template"`
		Asked    []map[string]string `json:"asked"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&order); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(order.Template))
	texts := []string{}
	for _, values := range order.Asked {
		var out strings.Builder
		if err := parsed.Execute(&out, values); err != nil {
			panic(err)
		}
		texts = append(texts, out.String())
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(texts); err != nil {
		panic(err)
	}
}
