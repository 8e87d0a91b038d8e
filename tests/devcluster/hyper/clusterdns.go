package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	answerTTL     = 1 // seconds: a test must see a replaced pod at once
	byServiceName = "service-name"
)

// clusterDNS answers from the informers' caches, by the Kubernetes DNS specification v1.1: A and SRV-free, IPv4 only,
// which is all that a pod resolver asks of a local cluster.
type clusterDNS struct {
	zone     string // "cluster.local."
	services cache.Store
	slices   cache.Indexer
}

// addresses returns the A records of one lower-case name and whether the name exists.
//
//	SERVICE.NAMESPACE.svc.ZONE           ClusterIP, or every published endpoint of a headless Service
//	HOSTNAME.SERVICE.NAMESPACE.svc.ZONE  the endpoints of that hostname
func (d *clusterDNS) addresses(name string) ([]string, bool) {
	relative, inZone := strings.CutSuffix(name, ".svc."+d.zone)
	if !inZone {
		return nil, false
	}
	labels := strings.Split(relative, ".")
	if len(labels) < 2 || len(labels) > 3 {
		return nil, false
	}
	hostname := ""
	if len(labels) == 3 {
		hostname, labels = labels[0], labels[1:]
	}
	key := labels[1] + "/" + labels[0]
	object, found, _ := d.services.GetByKey(key)
	if !found {
		return nil, false
	}
	service := object.(*corev1.Service)
	if service.Spec.ClusterIP != corev1.ClusterIPNone {
		if hostname != "" || service.Spec.ClusterIP == "" {
			return nil, false
		}
		return []string{service.Spec.ClusterIP}, true
	}
	return d.endpoints(service, hostname)
}

func (d *clusterDNS) endpoints(service *corev1.Service, hostname string) ([]string, bool) {
	var found []string
	slices, _ := d.slices.ByIndex(byServiceName, service.Namespace+"/"+service.Name)
	for _, object := range slices {
		for _, endpoint := range object.(*discoveryv1.EndpointSlice).Endpoints {
			// The EndpointSlice controller already counts publishNotReadyAddresses as ready.
			if endpoint.Conditions.Ready != nil && !*endpoint.Conditions.Ready {
				continue
			}
			if hostname != "" && (endpoint.Hostname == nil || *endpoint.Hostname != hostname) {
				continue
			}
			found = append(found, endpoint.Addresses...)
		}
	}
	return found, len(found) > 0
}

func (d *clusterDNS) ServeDNS(writer dns.ResponseWriter, request *dns.Msg) {
	reply := new(dns.Msg)
	reply.SetReply(request)
	reply.Authoritative = true
	if len(request.Question) != 1 {
		reply.Rcode = dns.RcodeFormatError
		_ = writer.WriteMsg(reply)
		return
	}
	question := request.Question[0]
	found, exists := d.addresses(strings.ToLower(question.Name))
	switch {
	case !exists:
		reply.Rcode = dns.RcodeNameError
	case question.Qtype == dns.TypeA || question.Qtype == dns.TypeANY:
		for _, address := range found {
			header := dns.RR_Header{Name: question.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: answerTTL}
			reply.Answer = append(reply.Answer, &dns.A{Hdr: header, A: net.ParseIP(address)})
		}
	}
	if _, udp := writer.RemoteAddr().(*net.UDPAddr); udp {
		size := dns.MinMsgSize
		if options := request.IsEdns0(); options != nil {
			size = int(options.UDPSize())
			reply.SetEdns0(uint16(size), false)
		}
		reply.Truncate(size)
	}
	_ = writer.WriteMsg(reply)
}

// startInformers fills the caches and returns once they hold the cluster's present state.
func startInformers(ctx context.Context, kubeconfig, zone string) (*clusterDNS, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	services := factory.Core().V1().Services().Informer()
	slices := factory.Discovery().V1().EndpointSlices().Informer()
	err = slices.AddIndexers(cache.Indexers{byServiceName: func(object any) ([]string, error) {
		meta := object.(metav1.Object)
		return []string{meta.GetNamespace() + "/" + meta.GetLabels()[discoveryv1.LabelServiceName]}, nil
	}})
	if err != nil {
		return nil, err
	}
	factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), services.HasSynced, slices.HasSynced) {
		return nil, fmt.Errorf("the Service and EndpointSlice caches did not fill")
	}
	return &clusterDNS{zone: zone, services: services.GetStore(), slices: slices.GetIndexer()}, nil
}

// runClusterDNS serves DNS on UDP and TCP, and /ready over HTTP once the caches are filled.
func runClusterDNS() {
	flags := flag.NewFlagSet("cluster-dns", flag.ExitOnError)
	kubeconfig := flags.String("kubeconfig", "", "credentials of the cluster to watch")
	listen := flags.String("listen", "", "address:port of the DNS service, UDP and TCP")
	ready := flags.String("ready", "", "address:port of GET /ready")
	zone := flags.String("zone", "cluster.local.", "the cluster's domain, with its final dot")
	_ = flags.Parse(os.Args[1:])

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	handler, err := startInformers(ctx, *kubeconfig, *zone)
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster-dns:", err)
		os.Exit(1)
	}
	failed := make(chan error, 3)
	for _, network := range []string{"udp", "tcp"} {
		server := &dns.Server{Addr: *listen, Net: network, Handler: handler}
		go func() { failed <- server.ListenAndServe() }()
	}
	http.HandleFunc("/ready", func(http.ResponseWriter, *http.Request) {})
	health := &http.Server{Addr: *ready, ReadHeaderTimeout: 5 * time.Second}
	go func() { failed <- health.ListenAndServe() }()
	select {
	case <-ctx.Done():
	case err := <-failed:
		fmt.Fprintln(os.Stderr, "cluster-dns:", err)
		os.Exit(1)
	}
}
